text = "\d"
print(1 is 1, text)
