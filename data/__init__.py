"""From files on disk to documents: shapes, containers, formats, readers, streams; and the drawn world."""
