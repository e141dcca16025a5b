"""`astrai-serve`: a model folder becomes a server.

What costs nothing to check is checked first, and torch is imported after that, so that a mistake
is answered at once.
"""

import dataclasses
import gc
import logging
import os
import ssl
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from astrai_core.command_line import CommandLineError, needs_extra, parse, told
from astrai_core.interop import peft
from astrai_core.machine import cores
from astrai_serve.engine.config import EngineConfig
from astrai_serve.generation_defaults import GenerationDefaults
from astrai_serve.listener import bind
from astrai_serve.log_format import JsonFormatter, TextFormatter

if TYPE_CHECKING:
    from astrai_core.model import Transformer
    from astrai_core.tokenizer import AutoTokenizer
    from astrai_serve.api import ServerSettings
    from astrai_serve.engine import InferenceEngine
    from astrai_serve.engine.tuning import ThreadChoice
    from astrai_serve.model_source import ModelSource

PROGRAM = "astrai-serve"
KEYS_VARIABLE = "ASTRAI_API_KEYS"
_NUM_BYTE_TOKENS = 259  # bytes and the chat template's three marks
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_CHECKPOINTS = "checkpoints"  # where a run keeps them
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Serve a model folder to any OpenAI client.

    Ctrl-C ends the server at once, SIGTERM after the answers under way; both exit with 0.
    """

    model: Path
    """Model folder: config.json, safetensors, tokenizer.json. With --random_weights also a YAML
    file of a model's fields, as those of configs/model. Or a LoRA checkpoint, which names its
    base."""
    adapter: Path | None = None
    """Folder of a LoRA adapter, ours or PEFT's, to merge into the model."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    model_name: str = ""
    """What clients call the model; empty is the folder's name, or a checkpoint's run's: a new
    checkpoint is no new name."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the weights; auto is the folder's own where this CPU computes in it."""
    weights: Literal["auto", "fp32", "bf16", "w8a8", "int8", "int4"] = "auto"
    """What the weights are rounded to as they are read: w8a8, int8 or int4; fp32 and bf16 are
    --dtype by other names. auto takes them as they are in the folder, quantised or not."""
    tokenizer: Path | None = None
    """Folder of the tokenizer, if not the model's."""
    random_weights: bool = False
    """Draw the weights instead of reading them, for plans and benchmarks; needs config.json, or a
    YAML file. Without a tokenizer, tokens are bytes, and those beyond have no text."""
    api_key_file: Path | None = None
    """File with one API key a line; the variable ASTRAI_API_KEYS holds them separated by commas."""
    allowed_hosts: str = ""
    """More names by which clients may address a server on loopback, separated by commas."""
    cors_origins: str = ""
    """Origins whose web pages may use the server, separated by commas, as http://localhost:3000."""
    max_body_mb: float = 8.0
    """Largest request read, in MB."""
    max_prompt_tokens: int | None = None
    """Longest prompt taken; None leaves the context as the only limit."""
    max_seconds: float | None = None
    """Longest time for an answer, waiting included; None sets no limit."""
    tls_certificate: Path | None = None
    """Certificate with its chain, in PEM: the server then speaks HTTPS only."""
    tls_key: Path | None = None
    """Key of the certificate, in PEM, if it is not in the same file."""
    drain_seconds: float = 10.0
    """After SIGTERM, answers under way may go on for so long."""
    access_log: bool = False
    """Log each request: who, what, how long, how many tokens; never its text."""
    log_format: Literal["text", "json"] = "text"
    """How the log is written: for people, or an object a line."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port must be from 0 to 65535, not {self.port}")
        if self.weights in ("fp32", "bf16") and self.dtype not in ("auto", _DTYPES[self.weights]):
            raise ValueError(
                f"--weights {self.weights} and --dtype {self.dtype} contradict each other; leave "
                "one of them out"
            )
        if not 0 < self.max_body_mb <= 1024:
            raise ValueError(f"--max_body_mb must be above 0 and at most 1024: {self.max_body_mb}")
        if not 0 <= self.drain_seconds <= 3600:
            raise ValueError(f"--drain_seconds must be from 0 to 3600, not {self.drain_seconds}")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ValueError(f"--max_prompt_tokens must be at least 1: {self.max_prompt_tokens}")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ValueError(f"--max_seconds must be above 0, not {self.max_seconds}")
        if self.tls_key is not None and self.tls_certificate is None:
            raise ValueError("--tls_key needs --tls_certificate")

    @property
    def tls(self) -> tuple[Path, Path | None] | None:
        """Files of the certificate and its key."""
        return None if self.tls_certificate is None else (self.tls_certificate, self.tls_key)

    @property
    def name(self) -> str:
        """What clients call the model."""
        path = (self.adapter or self.model).resolve()
        run = path.parent.parent.name if path.parent.name == _CHECKPOINTS else ""
        return self.model_name or run or (path.stem if path.is_file() else path.name)

    @property
    def speaks_bytes(self) -> bool:
        """Whether there is no tokenizer, so that bytes are the tokens."""
        return self.tokenizer is None and self.model.is_file()

    @property
    def text_folder(self) -> Path:
        """The folder that has the tokenizer: an adapter may have been trained with its own."""
        if self.tokenizer is None and self.adapter is not None:
            return self.adapter if (self.adapter / "tokenizer.json").is_file() else self.model
        return self.tokenizer or self.model

    @property
    def described_in(self) -> Path:
        """The file that says what the model is."""
        if self.model.is_file():
            return self.model
        config, adapter = self.model / "config.json", self.model / peft.CONFIG
        return adapter if adapter.is_file() and not config.is_file() else config


@needs_extra(PROGRAM, "serve")
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    try:
        options, config = parse(
            sys.argv[1:] if arguments is None else arguments, PROGRAM, ServeOptions, EngineConfig
        )
    except CommandLineError as error:
        _fail(error, status=2)
    gc.disable()  # what is imported stays: looking for garbage in it takes a third of the start
    try:
        serve(options, config)
    except KeyboardInterrupt:
        # before the server ran, which has its own way of ending
        _fail(InterruptedError("interrupted while loading"), status=130)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError:
            raise  # nothing that is known to go wrong
        _fail(error, status=1)
    finally:
        gc.enable()
    _leave()


def serve(options: ServeOptions, config: EngineConfig) -> None:
    """Load and serve until a signal comes.

    Raises:
        ValueError: the folder, its files or an option is wrong; the message says which.
    """
    check_files(options)
    check_threads(config)
    keys = _read_keys(options.api_key_file)
    defaults = GenerationDefaults.read(options.text_folder if options.adapter else options.model)
    with bind(options.host, options.port) as listener:
        port: int = listener.getsockname()[1]
        print(f"AstrAI loads {options.model} ...", flush=True)
        _start_log(options)
        from astrai_serve.loading import Loading
        from astrai_serve.model_source import ModelSource, dtype_name

        source = ModelSource.find(
            options.model,
            options.dtype,
            options.random_weights,
            options.adapter,
            options.weights,
        )
        config.context_within(source.config.max_len)  # refused before seconds of reading
        print(f"  {source.describe()}", flush=True)
        with Loading(source) as loading:
            # beside the weights, for which this thread would only wait
            from astrai_core.model.allocator import into_large_pages
            from astrai_serve.api import ServerSettings, run_server
            from astrai_serve.engine import InferenceEngine
            from astrai_serve.engine.core import EngineCore
            from astrai_serve.engine.tuning import choose_threads
            from astrai_serve.engine.warm_up import warm_up

            tokenizer = load_tokenizer(options, source)
            try:
                model = loading.result()
                core = EngineCore.of_model(model, tokenizer, config)
                # of the model as the core has made it: reproducible, if that is wanted
                choice = choose_threads(model, config)
                chosen = dataclasses.replace(config, num_threads=choice.threads)
                engine = InferenceEngine(model, tokenizer, chosen, core=core)
            except RuntimeError as error:
                if "allocate memory" not in str(error):
                    raise
                raise MemoryError(
                    f"{options.model} does not fit into this machine's memory; "
                    "try --weights w8a8, or a smaller --kv_cache_gb or --num_pages"
                ) from error
        settings = ServerSettings(
            model_name=options.name,
            created=int(options.described_in.stat().st_mtime),
            dtype=source.scheme or dtype_name(source.dtype),
            api_keys=keys,
            allowed_hosts=_allowed_hosts(options),
            cors_origins=tuple(_names(options.cors_origins)),
            max_body_bytes=round(options.max_body_mb * 1e6),
            max_prompt_tokens=options.max_prompt_tokens,
            max_seconds=options.max_seconds,
            log_requests=options.access_log,
            defaults=defaults,
        )
        engine.beside_steps(into_large_pages([*model.parameters(), *model.buffers()]))
        if choice.speed is None:
            engine.when_idle(_measure(engine, model, config, choice))
        else:
            engine.statistics.expect(choice.speed.prompt, choice.speed.alone)

        def report() -> None:
            gc.freeze()  # nor is it looked at later
            gc.enable()
            print(_report(options, settings, engine, source, port, choice), flush=True)

        with ThreadPoolExecutor(1, thread_name_prefix="astrai-warm-up") as beside:
            warming = beside.submit(warm_up, engine)
            run_server(
                engine,
                settings,
                listener,
                drain_seconds=options.drain_seconds,
                tls=options.tls,
                before_ready=warming.result,
                on_ready=report,
            )


def _measure(
    engine: "InferenceEngine", model: "Transformer", config: EngineConfig, choice: "ThreadChoice"
) -> Iterator[None]:
    """Measure what is not known of the threads, and compute on the best count from then on."""
    from astrai_serve.engine.tuning import measured

    was_guess = choice.is_guess
    choice = yield from measured(model, config, choice)
    engine.use_threads(choice.threads)
    if was_guess:
        print(_row("threads", str(choice)), flush=True)
    if choice.speed is not None:
        engine.statistics.expect(choice.speed.prompt, choice.speed.alone)
    speed = str(choice.speed or "not known: others compute here, or a step takes too long to try")
    print(_row("speed", speed), flush=True)


def check_files(options: ServeOptions) -> None:
    """Find the common mistakes without torch.

    Raises:
        ValueError: the message names the option.
    """
    path = options.model
    if not path.exists():
        raise ValueError(
            f"--model {path} does not exist; pass a model folder on this disk, "
            "names on the Hugging Face hub are not downloaded"
        )
    if path.is_file() and not options.random_weights:
        raise ValueError(
            f"--model {path} is a file; pass the model folder that holds it, or, for a YAML file "
            "of a model's fields, add --random_weights"
        )
    if not options.described_in.is_file():
        raise ValueError(f"--model {path} has no config.json: it is not a model folder")
    if options.adapter is not None:
        if not (options.adapter / peft.CONFIG).is_file():
            raise ValueError(
                f"--adapter {options.adapter} has no {peft.CONFIG}: it is not an adapter folder"
            )
        if options.random_weights:
            raise ValueError("--adapter and --random_weights contradict each other; leave one out")
    _check_tls(options)
    text = options.text_folder
    if not options.speaks_bytes and not (text / "tokenizer.json").is_file():
        raise ValueError(f"{text} has no tokenizer.json; --tokenizer names a folder that has one")


def check_threads(config: EngineConfig) -> None:
    """Refuse more threads than can run at once.

    Raises:
        ValueError: the message names the option.
    """
    most = len(cores().mask)
    if config.num_threads is not None and config.num_threads > most:
        raise ValueError(
            f"--num_threads {config.num_threads} exceeds the {most} cores that this process may "
            "use; leave it out to have the best number measured"
        )


def _check_tls(options: ServeOptions) -> None:
    if options.tls is None:
        return
    certificate, key = options.tls
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except OSError as error:  # SSLError is one
        raise ValueError(
            f"--tls_certificate {certificate} and its key cannot be used: {error}"
        ) from None


def _start_log(options: ServeOptions) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if options.log_format == "json" else TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # asyncio writes a line for each event sent to a client that has left: no news, and by the
    # thousand it fills a pipe that nobody reads, which then holds the whole server up
    logging.getLogger("asyncio").addFilter(lambda record: "socket.send()" not in record.msg)
    if options.access_log:
        logging.getLogger("astrai_serve.requests").setLevel(logging.INFO)


def _read_keys(path: Path | None) -> frozenset[str]:
    keys = set(_names(os.environ.get(KEYS_VARIABLE, "")))
    if path is not None:
        if not path.is_file():
            raise ValueError(f"--api_key_file {path} does not exist")
        lines = path.read_text("utf-8").splitlines()
        found = {line.strip() for line in lines if line.strip() and not line.startswith("#")}
        if not found:
            raise ValueError(f"--api_key_file {path} holds no key; write one a line")
        keys |= found
    return frozenset(keys)


def _allowed_hosts(options: ServeOptions) -> frozenset[str] | None:
    more = _names(options.allowed_hosts)
    if options.host not in _LOOPBACK and not more:
        return None  # by which names other machines know this one is not ours to tell
    return frozenset({*_LOOPBACK, "[::1]", options.host.lower(), *map(str.lower, more)})


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def load_tokenizer(options: ServeOptions, source: "ModelSource") -> "AutoTokenizer":
    """Read the tokenizer of a model.

    Raises:
        ValueError: it is not this model's.
    """
    from astrai_core.tokenizer import AutoTokenizer

    folder = options.text_folder
    if options.speaks_bytes:
        return AutoTokenizer.train([], _NUM_BYTE_TOKENS)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.vocab_size > source.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {folder} has {tokenizer.vocab_size} tokens, but {options.model} has "
            f"a vocab_size of {source.config.vocab_size}: it is not this model's tokenizer"
        )
    _ = tokenizer.stop_ids  # worked out here, beside the weights
    return tokenizer


def _report(
    options: ServeOptions,
    settings: "ServerSettings",
    engine: "InferenceEngine",
    source: "ModelSource",
    port: int,
    choice: "ThreadChoice",
) -> str:
    """What this server is, can hold and how fast it is, on one screen."""
    import torch

    from astrai_serve.engine.kv_storage import KVStorage
    from astrai_serve.engine.native_attention import why_not_native
    from astrai_serve.model_source import amount

    lost = why_not_native()
    config = engine.config
    kv_dtype = source.dtype if config.kv_dtype == "auto" else getattr(torch, config.kv_dtype)
    pages = int(engine.stats()["num_pages"])
    tokens = pages * config.page_size
    size = tokens * KVStorage.bytes_per_token(source.config, kv_dtype)
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"http{'s' * (options.tls is not None)}://{host}:{port}"
    threads = choice.threads
    rows = {
        "model": f"{settings.model_name}, {amount(source.num_parameters)} parameters, "
        f"{source.config.n_layers} layers, context {engine.max_context:,} tokens",
        "precision": f"{_precision(source)}, {threads} thread{'s' * (threads != 1)}",
        **({"adapter": f"{source.adapter}, merged"} if source.adapter else {}),
        **({"slower": f"attention and layers run on torch's operators: {lost}"} if lost else {}),
        "KV cache": f"{tokens:,} tokens in {pages:,} pages of {config.page_size}, up to "
        f"{size / 1e6:,.0f} MB: {_room(tokens, engine.max_context)} ({engine.why_pages})",
        "threads": str(choice),
        "speed": str(choice.speed or "measured as soon as nobody asks anything"),
        "at once": f"{config.max_running_tasks} answers, {config.max_queued_tasks} more wait",
        "sampling": f"{settings.defaults}, for requests that do not say",
        "access": _access(options, settings),
        "address": f"{address}  (API: {address}/v1; terminal: astrai-chat --url {address})",
        "stop": "Ctrl-C",
    }
    return "\n".join(_row(name, text) for name, text in rows.items())


def _row(name: str, text: str) -> str:
    return f"  {name:<10}{text}"


def _room(tokens: int, max_context: int) -> str:
    """How many conversations of what length the cache holds."""
    lengths = [max_context, *(length for length in (8000, 2000) if 2 * length < max_context)]
    told = [f"{tokens // length:,} of {length:,} tokens" for length in lengths[:3]]
    return f"room for {' or '.join(told)} at once"


def _precision(source: "ModelSource") -> str:
    """Number format of the weights and of the rest, and who computes with it."""
    from astrai_core.model.quantization import choose
    from astrai_serve.model_source import dtype_name

    rest = f"{dtype_name(source.dtype)} ({source.why})"
    if source.scheme is None:
        return rest
    return f"{source.scheme} weights (kernels: {choose().reason}), the rest {rest}"


def _access(options: ServeOptions, settings: "ServerSettings") -> str:
    if settings.api_keys:
        return f"{len(settings.api_keys)} API key{'s' * (len(settings.api_keys) != 1)}"
    if options.host in _LOOPBACK:
        return "this machine only, without a key"
    return "ANYONE who reaches this address, without a key; --api_key_file sets keys"


def _fail(error: Exception, status: int) -> NoReturn:
    sys.stderr.write(f"{PROGRAM}: {told(error)}\n")
    sys.exit(status)


def _leave() -> NoReturn:
    """Exit at once: taking torch down is of use to nobody, and a step may still be running."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
