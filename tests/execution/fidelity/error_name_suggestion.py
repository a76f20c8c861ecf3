import os

lenght = 1
print(length)
