raise ValueError("ä€ \udc80")
