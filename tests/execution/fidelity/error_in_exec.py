exec(compile("def f():\n    raise ValueError('inside')\nf()", "<generated>", "exec"))
