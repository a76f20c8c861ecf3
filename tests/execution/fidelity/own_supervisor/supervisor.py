MINE = "the local supervisor"
