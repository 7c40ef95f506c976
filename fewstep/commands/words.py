"""Words of the command line that several commands read."""


def numbers(flag: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag} {text}: whole numbers with commas between are needed, such as 3,5") from None
