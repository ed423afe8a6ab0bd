"""`trifold verify-resume`: `verify_resume` trains a short run undisturbed, and again with kill -9 at random
moments, and compares rows and losses. `processes` starts ranks as plain processes of this machine, without
Ray.
"""
