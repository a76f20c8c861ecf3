def endless(depth):
    return endless(depth + 1)


try:
    endless(0)
except RecursionError as error:
    print(error)
