print(list(globals()))
print({name: value for name, value in globals().items() if name not in ("__builtins__", "__loader__")})
print(__builtins__, type(__loader__), __loader__.name, __loader__.path)
