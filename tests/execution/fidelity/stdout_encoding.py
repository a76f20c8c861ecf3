import sys

print("ä€😀", ascii(sys.stdout.encoding), sys.getfilesystemencoding(), sys.getdefaultencoding())
sys.stderr.write("ä\udc80\n")
