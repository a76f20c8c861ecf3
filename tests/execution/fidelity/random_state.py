import random

random.seed(7)
print(random.random(), random.choice("abc"))
