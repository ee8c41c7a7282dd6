"""From files on disk to documents: shapes, pictures, containers, readers, streams, encoding; and the drawn world."""
