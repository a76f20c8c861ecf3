def numbers():
    try:
        yield 1
    finally:
        print("closed")


print(next(running := numbers()))
