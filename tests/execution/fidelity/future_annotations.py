# `dont_inherit`: the flags of our own modules must not reach the script.
def function(x: 1 + 1):
    pass


print(function.__annotations__)
