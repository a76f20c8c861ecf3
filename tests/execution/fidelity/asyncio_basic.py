import asyncio


async def main():
    process = await asyncio.create_subprocess_exec("echo", "from asyncio", stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    print(output, process.returncode)
    await asyncio.gather(asyncio.sleep(0.01), asyncio.to_thread(print, "in a thread"))


asyncio.run(main())
