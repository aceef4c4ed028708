from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Codec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CODEC_UNSPECIFIED: _ClassVar[Codec]
    CODEC_FP32: _ClassVar[Codec]
    CODEC_BF16: _ClassVar[Codec]
    CODEC_FP16: _ClassVar[Codec]
    CODEC_INT8: _ClassVar[Codec]
    CODEC_WORDS64: _ClassVar[Codec]
CODEC_UNSPECIFIED: Codec
CODEC_FP32: Codec
CODEC_BF16: Codec
CODEC_FP16: Codec
CODEC_INT8: Codec
CODEC_WORDS64: Codec

class TensorHeader(_message.Message):
    __slots__ = ("shared", "suffix", "codec", "shape")
    SHARED_FIELD_NUMBER: _ClassVar[int]
    SUFFIX_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    shared: int
    suffix: str
    codec: Codec
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, shared: _Optional[int] = ..., suffix: _Optional[str] = ..., codec: _Optional[_Union[Codec, str]] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class BlockRange(_message.Message):
    __slots__ = ("start", "stop")
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    start: int
    stop: int
    def __init__(self, start: _Optional[int] = ..., stop: _Optional[int] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol_version", "software_version")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    software_version: str
    def __init__(self, protocol_version: _Optional[int] = ..., software_version: _Optional[str] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("plan_sha256", "run_id")
    PLAN_SHA256_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    plan_sha256: str
    run_id: str
    def __init__(self, plan_sha256: _Optional[str] = ..., run_id: _Optional[str] = ...) -> None: ...

class Join(_message.Message):
    __slots__ = ("plan_sha256", "next_step", "prepared_step", "round", "role")
    PLAN_SHA256_FIELD_NUMBER: _ClassVar[int]
    NEXT_STEP_FIELD_NUMBER: _ClassVar[int]
    PREPARED_STEP_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    plan_sha256: str
    next_step: int
    prepared_step: int
    round: int
    role: str
    def __init__(self, plan_sha256: _Optional[str] = ..., next_step: _Optional[int] = ..., prepared_step: _Optional[int] = ..., round: _Optional[int] = ..., role: _Optional[str] = ...) -> None: ...

class StepOpen(_message.Message):
    __slots__ = ("step", "attempt")
    STEP_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    step: int
    attempt: int
    def __init__(self, step: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class Forward(_message.Message):
    __slots__ = ("step", "attempt", "micro_batch", "num_micro_batches", "blocks", "lengths", "num_target_tokens", "evaluate")
    STEP_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    NUM_MICRO_BATCHES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    NUM_TARGET_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    step: int
    attempt: int
    micro_batch: int
    num_micro_batches: int
    blocks: BlockRange
    lengths: _containers.RepeatedScalarFieldContainer[int]
    num_target_tokens: int
    evaluate: bool
    def __init__(self, step: _Optional[int] = ..., attempt: _Optional[int] = ..., micro_batch: _Optional[int] = ..., num_micro_batches: _Optional[int] = ..., blocks: _Optional[_Union[BlockRange, _Mapping]] = ..., lengths: _Optional[_Iterable[int]] = ..., num_target_tokens: _Optional[int] = ..., evaluate: bool = ...) -> None: ...

class Output(_message.Message):
    __slots__ = ("step", "attempt", "micro_batch", "evaluate")
    STEP_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    step: int
    attempt: int
    micro_batch: int
    evaluate: bool
    def __init__(self, step: _Optional[int] = ..., attempt: _Optional[int] = ..., micro_batch: _Optional[int] = ..., evaluate: bool = ...) -> None: ...

class Backward(_message.Message):
    __slots__ = ("step", "attempt", "micro_batch")
    STEP_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    step: int
    attempt: int
    micro_batch: int
    def __init__(self, step: _Optional[int] = ..., attempt: _Optional[int] = ..., micro_batch: _Optional[int] = ...) -> None: ...

class InputGradient(_message.Message):
    __slots__ = ("step", "attempt", "micro_batch", "evaluate")
    STEP_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    step: int
    attempt: int
    micro_batch: int
    evaluate: bool
    def __init__(self, step: _Optional[int] = ..., attempt: _Optional[int] = ..., micro_batch: _Optional[int] = ..., evaluate: bool = ...) -> None: ...

class Pullback(_message.Message):
    __slots__ = ("step", "micro_batch", "blocks", "lengths")
    STEP_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    step: int
    micro_batch: int
    blocks: BlockRange
    lengths: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, step: _Optional[int] = ..., micro_batch: _Optional[int] = ..., blocks: _Optional[_Union[BlockRange, _Mapping]] = ..., lengths: _Optional[_Iterable[int]] = ...) -> None: ...

class StepReady(_message.Message):
    __slots__ = ("step", "attempt", "num_target_tokens", "squared_norm")
    STEP_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NUM_TARGET_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SQUARED_NORM_FIELD_NUMBER: _ClassVar[int]
    step: int
    attempt: int
    num_target_tokens: int
    squared_norm: float
    def __init__(self, step: _Optional[int] = ..., attempt: _Optional[int] = ..., num_target_tokens: _Optional[int] = ..., squared_norm: _Optional[float] = ...) -> None: ...

class StepDone(_message.Message):
    __slots__ = ("step", "num_target_tokens", "clip_coefficient")
    STEP_FIELD_NUMBER: _ClassVar[int]
    NUM_TARGET_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CLIP_COEFFICIENT_FIELD_NUMBER: _ClassVar[int]
    step: int
    num_target_tokens: int
    clip_coefficient: float
    def __init__(self, step: _Optional[int] = ..., num_target_tokens: _Optional[int] = ..., clip_coefficient: _Optional[float] = ...) -> None: ...

class RoundOpen(_message.Message):
    __slots__ = ("round", "attempt")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    round: int
    attempt: int
    def __init__(self, round: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class RoundUpdate(_message.Message):
    __slots__ = ("round", "num_target_tokens")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    NUM_TARGET_TOKENS_FIELD_NUMBER: _ClassVar[int]
    round: int
    num_target_tokens: int
    def __init__(self, round: _Optional[int] = ..., num_target_tokens: _Optional[int] = ...) -> None: ...

class RoundResult(_message.Message):
    __slots__ = ("round",)
    ROUND_FIELD_NUMBER: _ClassVar[int]
    round: int
    def __init__(self, round: _Optional[int] = ...) -> None: ...

class SecureKeys(_message.Message):
    __slots__ = ("round", "attempt", "certificate", "sharing_key", "mask_key", "commitment", "signature")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    SHARING_KEY_FIELD_NUMBER: _ClassVar[int]
    MASK_KEY_FIELD_NUMBER: _ClassVar[int]
    COMMITMENT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    round: int
    attempt: int
    certificate: bytes
    sharing_key: bytes
    mask_key: bytes
    commitment: bytes
    signature: bytes
    def __init__(self, round: _Optional[int] = ..., attempt: _Optional[int] = ..., certificate: _Optional[bytes] = ..., sharing_key: _Optional[bytes] = ..., mask_key: _Optional[bytes] = ..., commitment: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class SecureRoster(_message.Message):
    __slots__ = ("round", "attempt", "names", "certificates", "sharing_keys", "mask_keys", "commitments", "signatures")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATES_FIELD_NUMBER: _ClassVar[int]
    SHARING_KEYS_FIELD_NUMBER: _ClassVar[int]
    MASK_KEYS_FIELD_NUMBER: _ClassVar[int]
    COMMITMENTS_FIELD_NUMBER: _ClassVar[int]
    SIGNATURES_FIELD_NUMBER: _ClassVar[int]
    round: int
    attempt: int
    names: _containers.RepeatedScalarFieldContainer[str]
    certificates: _containers.RepeatedScalarFieldContainer[bytes]
    sharing_keys: _containers.RepeatedScalarFieldContainer[bytes]
    mask_keys: _containers.RepeatedScalarFieldContainer[bytes]
    commitments: _containers.RepeatedScalarFieldContainer[bytes]
    signatures: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, round: _Optional[int] = ..., attempt: _Optional[int] = ..., names: _Optional[_Iterable[str]] = ..., certificates: _Optional[_Iterable[bytes]] = ..., sharing_keys: _Optional[_Iterable[bytes]] = ..., mask_keys: _Optional[_Iterable[bytes]] = ..., commitments: _Optional[_Iterable[bytes]] = ..., signatures: _Optional[_Iterable[bytes]] = ...) -> None: ...

class SecureShares(_message.Message):
    __slots__ = ("round", "attempt", "names", "sealed")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    round: int
    attempt: int
    names: _containers.RepeatedScalarFieldContainer[str]
    sealed: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, round: _Optional[int] = ..., attempt: _Optional[int] = ..., names: _Optional[_Iterable[str]] = ..., sealed: _Optional[_Iterable[bytes]] = ...) -> None: ...

class SecureDelivery(_message.Message):
    __slots__ = ("round", "attempt", "names", "sealed")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    round: int
    attempt: int
    names: _containers.RepeatedScalarFieldContainer[str]
    sealed: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, round: _Optional[int] = ..., attempt: _Optional[int] = ..., names: _Optional[_Iterable[str]] = ..., sealed: _Optional[_Iterable[bytes]] = ...) -> None: ...

class SecureUpdate(_message.Message):
    __slots__ = ("round", "attempt")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    round: int
    attempt: int
    def __init__(self, round: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class SecureSurvivors(_message.Message):
    __slots__ = ("round", "attempt", "names")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    round: int
    attempt: int
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, round: _Optional[int] = ..., attempt: _Optional[int] = ..., names: _Optional[_Iterable[str]] = ...) -> None: ...

class SecureConsent(_message.Message):
    __slots__ = ("round", "attempt", "signature")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    round: int
    attempt: int
    signature: bytes
    def __init__(self, round: _Optional[int] = ..., attempt: _Optional[int] = ..., signature: _Optional[bytes] = ...) -> None: ...

class SecureEvidence(_message.Message):
    __slots__ = ("round", "attempt", "names", "signatures")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    SIGNATURES_FIELD_NUMBER: _ClassVar[int]
    round: int
    attempt: int
    names: _containers.RepeatedScalarFieldContainer[str]
    signatures: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, round: _Optional[int] = ..., attempt: _Optional[int] = ..., names: _Optional[_Iterable[str]] = ..., signatures: _Optional[_Iterable[bytes]] = ...) -> None: ...

class SecureReveal(_message.Message):
    __slots__ = ("round", "attempt", "names", "shares")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    round: int
    attempt: int
    names: _containers.RepeatedScalarFieldContainer[str]
    shares: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, round: _Optional[int] = ..., attempt: _Optional[int] = ..., names: _Optional[_Iterable[str]] = ..., shares: _Optional[_Iterable[bytes]] = ...) -> None: ...

class FetchTrunk(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TrunkState(_message.Message):
    __slots__ = ("next_step",)
    NEXT_STEP_FIELD_NUMBER: _ClassVar[int]
    next_step: int
    def __init__(self, next_step: _Optional[int] = ...) -> None: ...

class Waiting(_message.Message):
    __slots__ = ("step", "waiting_for")
    STEP_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    step: int
    waiting_for: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, step: _Optional[int] = ..., waiting_for: _Optional[_Iterable[str]] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("next_step",)
    NEXT_STEP_FIELD_NUMBER: _ClassVar[int]
    next_step: int
    def __init__(self, next_step: _Optional[int] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "message", "retry_after_s", "step", "fatal")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    FATAL_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    retry_after_s: float
    step: int
    fatal: bool
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., retry_after_s: _Optional[float] = ..., step: _Optional[int] = ..., fatal: bool = ...) -> None: ...

class SessionOpen(_message.Message):
    __slots__ = ("session", "owner", "num_sequences", "max_tokens", "blocks")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    NUM_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    session: int
    owner: int
    num_sequences: int
    max_tokens: int
    blocks: BlockRange
    def __init__(self, session: _Optional[int] = ..., owner: _Optional[int] = ..., num_sequences: _Optional[int] = ..., max_tokens: _Optional[int] = ..., blocks: _Optional[_Union[BlockRange, _Mapping]] = ...) -> None: ...

class SessionOpened(_message.Message):
    __slots__ = ("session", "held", "version", "lease_s")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    session: int
    held: _containers.RepeatedScalarFieldContainer[int]
    version: int
    lease_s: float
    def __init__(self, session: _Optional[int] = ..., held: _Optional[_Iterable[int]] = ..., version: _Optional[int] = ..., lease_s: _Optional[float] = ...) -> None: ...

class SessionForward(_message.Message):
    __slots__ = ("session", "number", "positions", "lengths", "sources", "silent")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    SILENT_FIELD_NUMBER: _ClassVar[int]
    session: int
    number: int
    positions: _containers.RepeatedScalarFieldContainer[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    sources: _containers.RepeatedScalarFieldContainer[int]
    silent: bool
    def __init__(self, session: _Optional[int] = ..., number: _Optional[int] = ..., positions: _Optional[_Iterable[int]] = ..., lengths: _Optional[_Iterable[int]] = ..., sources: _Optional[_Iterable[int]] = ..., silent: bool = ...) -> None: ...

class SessionOutput(_message.Message):
    __slots__ = ("session", "number")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    session: int
    number: int
    def __init__(self, session: _Optional[int] = ..., number: _Optional[int] = ...) -> None: ...

class SessionClose(_message.Message):
    __slots__ = ("session", "owner")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    session: int
    owner: int
    def __init__(self, session: _Optional[int] = ..., owner: _Optional[int] = ...) -> None: ...

class SessionFailed(_message.Message):
    __slots__ = ("session", "code", "message", "retry_after_s")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    session: int
    code: str
    message: str
    retry_after_s: float
    def __init__(self, session: _Optional[int] = ..., code: _Optional[str] = ..., message: _Optional[str] = ..., retry_after_s: _Optional[float] = ...) -> None: ...

class Header(_message.Message):
    __slots__ = ("tensors", "hello", "welcome", "join", "step_open", "forward", "output", "backward", "input_gradient", "step_ready", "step_done", "round_update", "round_result", "fetch_trunk", "trunk_state", "waiting", "finished", "failure", "round_open", "session_open", "session_opened", "session_forward", "session_output", "session_close", "session_failed", "pullback", "secure_keys", "secure_roster", "secure_shares", "secure_delivery", "secure_update", "secure_survivors", "secure_consent", "secure_evidence", "secure_reveal")
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    JOIN_FIELD_NUMBER: _ClassVar[int]
    STEP_OPEN_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_FIELD_NUMBER: _ClassVar[int]
    INPUT_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    STEP_READY_FIELD_NUMBER: _ClassVar[int]
    STEP_DONE_FIELD_NUMBER: _ClassVar[int]
    ROUND_UPDATE_FIELD_NUMBER: _ClassVar[int]
    ROUND_RESULT_FIELD_NUMBER: _ClassVar[int]
    FETCH_TRUNK_FIELD_NUMBER: _ClassVar[int]
    TRUNK_STATE_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    ROUND_OPEN_FIELD_NUMBER: _ClassVar[int]
    SESSION_OPEN_FIELD_NUMBER: _ClassVar[int]
    SESSION_OPENED_FIELD_NUMBER: _ClassVar[int]
    SESSION_FORWARD_FIELD_NUMBER: _ClassVar[int]
    SESSION_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    SESSION_CLOSE_FIELD_NUMBER: _ClassVar[int]
    SESSION_FAILED_FIELD_NUMBER: _ClassVar[int]
    PULLBACK_FIELD_NUMBER: _ClassVar[int]
    SECURE_KEYS_FIELD_NUMBER: _ClassVar[int]
    SECURE_ROSTER_FIELD_NUMBER: _ClassVar[int]
    SECURE_SHARES_FIELD_NUMBER: _ClassVar[int]
    SECURE_DELIVERY_FIELD_NUMBER: _ClassVar[int]
    SECURE_UPDATE_FIELD_NUMBER: _ClassVar[int]
    SECURE_SURVIVORS_FIELD_NUMBER: _ClassVar[int]
    SECURE_CONSENT_FIELD_NUMBER: _ClassVar[int]
    SECURE_EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    SECURE_REVEAL_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[TensorHeader]
    hello: Hello
    welcome: Welcome
    join: Join
    step_open: StepOpen
    forward: Forward
    output: Output
    backward: Backward
    input_gradient: InputGradient
    step_ready: StepReady
    step_done: StepDone
    round_update: RoundUpdate
    round_result: RoundResult
    fetch_trunk: FetchTrunk
    trunk_state: TrunkState
    waiting: Waiting
    finished: Finished
    failure: Failure
    round_open: RoundOpen
    session_open: SessionOpen
    session_opened: SessionOpened
    session_forward: SessionForward
    session_output: SessionOutput
    session_close: SessionClose
    session_failed: SessionFailed
    pullback: Pullback
    secure_keys: SecureKeys
    secure_roster: SecureRoster
    secure_shares: SecureShares
    secure_delivery: SecureDelivery
    secure_update: SecureUpdate
    secure_survivors: SecureSurvivors
    secure_consent: SecureConsent
    secure_evidence: SecureEvidence
    secure_reveal: SecureReveal
    def __init__(self, tensors: _Optional[_Iterable[_Union[TensorHeader, _Mapping]]] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., join: _Optional[_Union[Join, _Mapping]] = ..., step_open: _Optional[_Union[StepOpen, _Mapping]] = ..., forward: _Optional[_Union[Forward, _Mapping]] = ..., output: _Optional[_Union[Output, _Mapping]] = ..., backward: _Optional[_Union[Backward, _Mapping]] = ..., input_gradient: _Optional[_Union[InputGradient, _Mapping]] = ..., step_ready: _Optional[_Union[StepReady, _Mapping]] = ..., step_done: _Optional[_Union[StepDone, _Mapping]] = ..., round_update: _Optional[_Union[RoundUpdate, _Mapping]] = ..., round_result: _Optional[_Union[RoundResult, _Mapping]] = ..., fetch_trunk: _Optional[_Union[FetchTrunk, _Mapping]] = ..., trunk_state: _Optional[_Union[TrunkState, _Mapping]] = ..., waiting: _Optional[_Union[Waiting, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., round_open: _Optional[_Union[RoundOpen, _Mapping]] = ..., session_open: _Optional[_Union[SessionOpen, _Mapping]] = ..., session_opened: _Optional[_Union[SessionOpened, _Mapping]] = ..., session_forward: _Optional[_Union[SessionForward, _Mapping]] = ..., session_output: _Optional[_Union[SessionOutput, _Mapping]] = ..., session_close: _Optional[_Union[SessionClose, _Mapping]] = ..., session_failed: _Optional[_Union[SessionFailed, _Mapping]] = ..., pullback: _Optional[_Union[Pullback, _Mapping]] = ..., secure_keys: _Optional[_Union[SecureKeys, _Mapping]] = ..., secure_roster: _Optional[_Union[SecureRoster, _Mapping]] = ..., secure_shares: _Optional[_Union[SecureShares, _Mapping]] = ..., secure_delivery: _Optional[_Union[SecureDelivery, _Mapping]] = ..., secure_update: _Optional[_Union[SecureUpdate, _Mapping]] = ..., secure_survivors: _Optional[_Union[SecureSurvivors, _Mapping]] = ..., secure_consent: _Optional[_Union[SecureConsent, _Mapping]] = ..., secure_evidence: _Optional[_Union[SecureEvidence, _Mapping]] = ..., secure_reveal: _Optional[_Union[SecureReveal, _Mapping]] = ...) -> None: ...
