print(hash("a string") % 1_000_000)
