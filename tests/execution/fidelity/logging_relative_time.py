import logging

record = logging.makeLogRecord({})
print(0 <= record.relativeCreated < 5000)
