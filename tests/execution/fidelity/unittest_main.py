import unittest


class Test(unittest.TestCase):
    def test_name(self):
        self.assertEqual(self.__class__.__module__, "__main__")


unittest.main(argv=["unittest_main"], verbosity=0, exit=False, testRunner=unittest.TextTestRunner(stream=open("/dev/null", "w")))
