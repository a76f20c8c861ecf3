import logging
import sys

logging.warning("before configuration")
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(levelname)s %(module)s", force=True)
logging.debug("after")
print(logging.getLogger().handlers, logging.getLogger().level)
