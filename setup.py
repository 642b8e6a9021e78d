"""What pyproject.toml cannot say: nbdev's index of the notebooks stays out of the wheel."""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithoutIndex(build_py):
    def find_package_modules(self, package, package_dir):
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if module[1] != "_modidx"]


setup(cmdclass={"build_py": BuildWithoutIndex})
