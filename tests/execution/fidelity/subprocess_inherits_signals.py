import subprocess

print(subprocess.run(["sh", "-c", "grep -E 'Sig(Ign|Blk|Cgt)' /proc/self/status"], capture_output=True, text=True).stdout)
