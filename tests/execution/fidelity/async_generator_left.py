import asyncio


async def generator():
    try:
        yield 1
    finally:
        print("closed")


async def main():
    async for value in generator():
        print(value)
        break


asyncio.run(main())
