"""What a user can do wrong. Each message is one line: the name, the value, the rule, what to do next.

```
ValueError
├── search_spaces.config.InvalidConfig     an architecture that cannot be built
├── search_spaces.space.InvalidSpace       a search space file that contradicts itself
├── targets.spec.InvalidDevice             an unknown or malformed device
└── nas.errors.UserError
    ├── InvalidCorpus                      text that cannot be trained on
    ├── InvalidTasks                       tasks that cannot be scored
    └── InvalidRun                         a run folder that cannot be used
```
"""


class UserError(ValueError):
    """A user's mistake; the command line prints the message alone and exits with status 2."""


class InvalidCorpus(UserError):
    """Text that cannot be trained on."""


class InvalidTasks(UserError):
    """Tasks, or a text, that a model cannot be scored on."""


class InvalidRun(UserError):
    """A run folder that does not exist, is damaged, or was made with other settings."""
