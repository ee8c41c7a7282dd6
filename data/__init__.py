"""From files on disk to documents: shapes, containers, formats, readers, streams, encoding; the drawn world."""
