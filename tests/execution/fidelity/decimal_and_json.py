import decimal
import json

print(json.dumps({"a": [1, 2.5, None]}), decimal.getcontext(), decimal.Decimal(1) / 3)
