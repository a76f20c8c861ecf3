from os import there_is_no_such_name
