import asyncio


async def forgotten():
    pass


loop = asyncio.new_event_loop()
task = loop.create_task(asyncio.sleep(10))
coroutine = forgotten()
loop.run_until_complete(asyncio.sleep(0))
print("end")
