import locale

print(locale.setlocale(locale.LC_ALL, None), locale.getlocale(), locale.getpreferredencoding(), locale.localeconv())
