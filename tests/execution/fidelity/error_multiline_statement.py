def call(a, b):
    return a + b


result = call(
    1,
    call(2,
         "three"),
)
