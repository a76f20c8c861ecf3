import gzip

archive = gzip.GzipFile("data.gz", "wb", mtime=0)
archive.write(b"content")
