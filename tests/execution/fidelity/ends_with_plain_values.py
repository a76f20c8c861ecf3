import os
import sys

number, text, nothing = 12, "ä", None
sys.stdout.write("no end of line")
os.environ["PLAIN"] = text
