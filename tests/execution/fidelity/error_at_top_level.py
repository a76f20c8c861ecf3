value = {}
value["missing"]
