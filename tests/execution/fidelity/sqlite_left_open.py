import sqlite3

connection = sqlite3.connect("data.db")
connection.execute("create table t (x)")
connection.commit()
print(connection.execute("select count(*) from t").fetchone())
