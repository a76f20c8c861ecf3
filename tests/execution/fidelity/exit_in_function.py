def leave():
    try:
        raise SystemExit(6)
    finally:
        print("finally")


leave()
