import json

print(json.MINE)
