"""The faults: what may break, and what arealite then promises. Tests refer to them by number."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of docs/faults.md, without its tests."""

    fault: str
    promise: str


ROWS: dict[int, Row] = {
    1: Row(
        "A server is killed while it generates",
        "Its requests start again elsewhere within seconds, and no sample counts twice.",
    ),
    2: Row(
        "Only the API process of a server is killed",
        "The supervisor ends what it left behind and starts it again at the same port.",
    ),
    3: Row(
        "A worker below a server dies",
        "The server is given up at its first answers of 500, and has the present weights before "
        "it serves again.",
    ),
    4: Row(
        "An engine hangs while /health answers",
        "Given up after server.hang_timeout_s without an answer of the engine itself.",
    ),
    5: Row(
        "An engine stalls for a few seconds",
        "Nothing is killed; the requests end as if nothing had been.",
    ),
    6: Row(
        "A server crashes at its first request",
        "The supervisor's own first requests meet the crash: an error before the run begins.",
    ),
    7: Row(
        "A server never gets ready",
        "An error at server.startup_timeout_s, or when the process ends, with the end of its log.",
    ),
    8: Row(
        "A server dies again and again",
        "Started again with growing pauses; after server.max_restarts the run ends with the log.",
    ),
    9: Row(
        "Somebody listens on the port",
        "Another port at the first start, else an error that names the process.",
    ),
    10: Row(
        "The port is taken between its choice and the start",
        "The start is tried again on another port.",
    ),
    11: Row(
        "A server answers 500 for a while",
        "Asked again with random growing pauses, and counted; the rows arrive.",
    ),
    12: Row(
        "A server answers 429 or 503 with Retry-After",
        "It is left alone for as long as it asks.",
    ),
    13: Row(
        "A server refuses a request with 400",
        "Never asked again; the row is recorded with the server's reason.",
    ),
    14: Row(
        "A reply takes ten times as long as the others",
        "Given up by what earlier requests took, and asked for again.",
    ),
    15: Row("A reply comes byte by byte", "Given up after seconds, and asked for again."),
    16: Row("A reply is cut off", "Asked for again; no part of it is used."),
    17: Row(
        "A connection is reset, or was closed while idle",
        "Asked again without a word.",
    ),
    18: Row(
        "A reply comes twice, or after its request was given up",
        "Used once, and by no other request.",
    ),
    19: Row(
        "A reply has more or fewer log-probs than tokens",
        "The sample is refused and counted.",
    ),
    20: Row(
        "A log-prob is nan, null, -9999 or positive",
        "The sample is refused, a reply that is no JSON asked for again; many end the run.",
    ),
    21: Row("A token id is not of the model", "The sample is refused."),
    22: Row(
        "The weight versions of a reply are missing, have a gap, or are of the future",
        "The sample is refused, never given a version that the server did not say.",
    ),
    23: Row(
        "An unknown finish reason, or counts of tokens that do not fit",
        "The sample is refused.",
    ),
    36: Row(
        "An update fails on one of two servers",
        "That one serves nothing until it has the weights; if it fails on all, the run ends.",
    ),
    37: Row(
        "A trainer dies between pause and resume",
        "The server resumes by itself, or is brought in order by the next trainer.",
    ),
    40: Row(
        "A reward function raises",
        "The row is recorded with the error, and the next one takes its place.",
    ),
    41: Row(
        "A reward function hangs, in Python or in C",
        "Killed at its deadline; calls beside it and after it are not affected.",
    ),
    42: Row(
        "A reward function eats memory or starts processes",
        "It dies at its limit of memory or processes, and what it started dies with its worker.",
    ),
    43: Row(
        "A reward function returns no finite number",
        "The row is recorded with what came back; it never counts as 0.",
    ),
    44: Row(
        "A reward worker is killed",
        "The call is tried once more; then the row is recorded with how the worker ended.",
    ),
    45: Row(
        "A reward function prints, reads stdin or exits",
        "None of it reaches the run; an exit is an error of that row alone.",
    ),
    46: Row(
        "A row of the data set is malformed",
        "An error when the rows are loaded, with file and line; or it is left out, up to a quota.",
    ),
    47: Row(
        "Fewer rows than a batch, or none; the end of an epoch",
        "Rows repeat, each once per epoch; a data set without rows is an error.",
    ),
    48: Row(
        "A tokenizer lacks its chat template, end token or padding token",
        "Without template or end token an error before anything starts; padding is not needed.",
    ),
    49: Row(
        "Tokenizer, model and server do not belong together",
        "An error before anything is trained.",
    ),
    50: Row(
        "A prompt fills the context, or leaves less room than the budget",
        "An error that says what to change; a response cut by the context says `context`, one "
        "that used up its budget `length`.",
    ),
    51: Row(
        "A response is empty, or only an end token",
        "The one is recorded as failed, the other trained on; nothing becomes nan.",
    ),
    52: Row(
        "All rewards of a group are equal",
        "Its advantages are exactly 0, and the run goes on.",
    ),
    53: Row(
        "Every row is rejected",
        "The run ends, and says how many rows gave nothing and why.",
    ),
    54: Row(
        "One sample of a group is lost",
        "The group is dropped whole, and its other requests end.",
    ),
    57: Row(
        "A setting is out of range, unknown or of the wrong type",
        "All such settings are refused in one message, before any process starts.",
    ),
    60: Row(
        "The process runs out of file descriptors",
        "An error that names the limit; no busy loop.",
    ),
    61: Row(
        "Something in the background raises",
        "The main thread raises within a second, with the cause.",
    ),
    63: Row(
        "Somebody without the token pauses, updates or asks a server",
        "401 on every path but /health.",
    ),
    64: Row(
        "An update names a file of somebody else",
        "Only safetensors files inside the run's own folder are read.",
    ),
    65: Row(
        "The token could leak",
        "It is in no log, process list, error message, repr or file of the run.",
    ),
    66: Row(
        "One of two servers cannot be reached",
        "It is given up, the other one does all the work, nothing stalls.",
    ),
    67: Row(
        "An update is cut off before its version is known",
        "The server serves nothing until it was given the weights again.",
    ),
    68: Row(
        "Somebody restarts a server, so that it has its first weights",
        "Noticed by its version, and given the weights before it serves.",
    ),
    69: Row(
        "Somebody without the key of an episode calls the endpoint for agents",
        "401, whatever is asked for; the key ends with the episode.",
    ),
    70: Row(
        "An agent gives up a call, or goes on after its episode",
        "What is sampled for it is aborted, and nothing of it is trained on.",
    ),
    71: Row(
        "The engine fails, and an agent makes something of it",
        "The episode fails with the engine's error, unless a later call was answered.",
    ),
    72: Row(
        "A workflow calls tokens sampled that the engine did not sample there",
        "The row fails, and the error names the token.",
    ),
    73: Row(
        "A program that a model wrote takes too much, or attacks",
        "It ends within its limit and a second; what runs beside it passes.",
    ),
}
