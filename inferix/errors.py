"""What the engine raises when the user can put it right."""


class InputError(ValueError):
    """Bad input: a path, a file, a setting or a combination of them that cannot work.

    The message is one line that says what is wrong and what to do. The runners print it and exit with 2.
    """
