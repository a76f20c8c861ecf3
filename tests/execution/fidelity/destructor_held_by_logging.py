import logging


class Handler(logging.Handler):
    def emit(self, record):
        print("handled", record.getMessage())

    def close(self):
        print("closed")
        super().close()


logging.getLogger().addHandler(Handler())
logging.warning("hello")
