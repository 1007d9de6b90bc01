"""Addresses of databases and servers, and how they are shown: without the secrets in them."""

from __future__ import annotations

import re
from urllib.parse import quote, unquote, urlsplit

__all__ = ["credentials", "hidden", "quoted", "without_credentials"]

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# the last word of the key of a query parameter, or of a `key=value` in what a driver says, that names a secret
_SECRET_KEY = (
    r"[\w.-]*(?:pass(?:word|wd|phrase)?|pwd|token|secret|credentials?|signature|sig|auth"
    r"|odbc_connect|(?:api|access|account|private)[_-]?key)"
)
_PAIR = re.compile(rf"(?<![\w.-])({_SECRET_KEY})(\s*=\s*)('[^']*'|\"[^\"]*\"|[^\s&;,'\"]+)", re.IGNORECASE)
_LOGIN = re.compile(
    r"(?<![\w/])([\w.+-]*):[^\s/@:'\"]+@(?=[\w\[])"
)  # user:password@host, where the scheme was forgotten
_OPTION = re.compile(r"--[\w-]+=")  # of a command line
_HIDDEN = "***"


def hidden(text: str, *addresses: str) -> str:
    """Hide the passwords in an address, or in any text that holds some.

    A user's name stays. A name without a password is hidden in http addresses, where it often is a token.

    Args:
        text: what is to be shown or recorded.
        addresses: addresses whose passwords may stand in the text apart from them, as in what a driver says.

    Example:
        >>> hidden("postgresql://me:pass@word@host/study"), hidden("mysql://host/study?user=me&password=x&charset=utf8")
        ('postgresql://me:***@host/study', 'mysql://host/study?user=me&password=***&charset=utf8')
        >>> hidden('cannot reach "word@host"', "postgresql://me:pass@word@host/study")
        'cannot reach "***@host"'
    """
    option = _OPTION.match(text)
    begin = option.end() if option else 0
    text = text[:begin] + _shown(text[begin:])  # where it is an address itself, spaces and all
    parts = re.split(rf"({_SCHEME.pattern}\S*)", text)  # every second one is an address
    text = "".join(_shown(part) if odd % 2 else _LOGIN.sub(rf"\1:{_HIDDEN}@", part) for odd, part in enumerate(parts))
    for secret in sorted({part for address in addresses for part in _secrets_in(address)}, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", _HIDDEN, text)
    return _PAIR.sub(rf"\1\2{_HIDDEN}", text)


def _secrets_in(address: str) -> set[str]:
    """The passwords in an address, as written and decoded, and the parts that a reader splits an unquoted @ into."""
    start, user, password, _ = _parts(address)
    found = {password} if password is not None else {user} if start.startswith("http") else set()
    found |= {value.strip("'\"") for _, _, value in _PAIR.findall(address) + _PAIR.findall(unquote(address))}
    found |= {unquote(value) for value in found if value}
    found |= {part for value in found if value for part in value.split("@") if len(part) > 2}
    return {value for value in found if value}


def credentials(address: str) -> tuple[str, str] | None:
    """The user and the password of an http address, decoded; None where it does not have both."""
    start, user, password, _ = _parts(address)
    return (unquote(user), unquote(password)) if start.startswith("http") and user and password else None


def without_credentials(address: str) -> str:
    """The address without its login, for a client that takes user and password separately."""
    start, _, _, rest = _parts(address)
    return start + rest


def quoted(address: str) -> str:
    """The address with a password that every reader understands: an @ in it is written %40."""
    start, user, password, rest = _parts(address)
    return address if password is None else f"{start}{user}:{quote(unquote(password), safe='')}@{rest}"


def _shown(address: str) -> str:
    start, user, password, rest = _parts(address)
    if password is None and not (user and start.startswith("http")):
        return address
    return f"{start}{user}:{_HIDDEN}@{rest}" if password is not None else f"{start}{_HIDDEN}@{rest}"


def _parts(address: str) -> tuple[str, str, str | None, str]:
    """Scheme with `://` in lower case, user, password (None without one), and what follows the @.

    The password ends at the last @ before the path, or at a later one where no host could end before: who writes a
    password by hand does not always quote it.
    """
    found = _SCHEME.match(address)
    if found is None:
        return "", "", None, address
    start, rest = found[0].lower(), address[found.end() :]
    end = min((place for mark in "/?#" if (place := rest.find(mark)) >= 0), default=len(rest))
    at = rest.rfind("@", 0, end)
    if at < 0 and "@" in rest and not _is_host(rest[:end]):
        at = rest.rfind("@")
    if at < 0:
        return start, "", None, rest
    user, colon, password = rest[:at].partition(":")
    return start, user, password if colon else None, rest[at + 1 :]


def _is_host(text: str) -> bool:
    """Whether a host, with or without its port, stands there."""
    try:
        urlsplit(f"//{text}").port  # noqa: B018  (to read it checks it)
    except ValueError:  # what follows the colon is not a port, but the start of a password
        return False
    return True
