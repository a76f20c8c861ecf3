import zipfile

archive = zipfile.ZipFile("archive.zip", "w")
archive.writestr(zipfile.ZipInfo("member"), "content")
