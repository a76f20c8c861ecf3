import logging

logging.basicConfig(filename="log.txt", format="%(name)s:%(message)s")
logging.error("into the file")
