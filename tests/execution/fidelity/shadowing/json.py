MINE = "the local json"
