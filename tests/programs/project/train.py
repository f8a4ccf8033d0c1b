import sys

print("keras" in sys.modules)
