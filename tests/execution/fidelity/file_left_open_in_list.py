files = [open(f"{name}.txt", "w") for name in "ab"]
for file in files:
    file.write(file.name)
files.append(files)
