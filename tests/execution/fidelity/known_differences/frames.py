import inspect

print([frame.filename for frame in inspect.stack()])
