"""The nouns: what flows from a task to a better policy.

    Task ──> Episode ──> Trajectory ──> TrajectoryGroup ──> Sample ──> Batch ──> weights

Every room speaks in these types and may import them from here; they import only the standard library and
numpy. Arrays carry their axes in their names: ``_T`` tokens of one row, ``_BT`` packed rows × tokens,
``_G`` siblings of one group. Everything here is frozen: a noun is made once, by the room that knows it.
"""

from turnwise.types.chat import Content, ImageBlock, Message, Role, TextBlock, ToolCall, ToolSchema
from turnwise.types.environment import Kept, Step, Task, ToolResult
from turnwise.types.learning import (
    AdapterSource,
    Batch,
    BoolArray,
    FloatArray,
    IntArray,
    Sample,
    WeightSource,
)
from turnwise.types.tokens import Completion, Finish, Rendered, Reply, Sampling
from turnwise.types.trajectory import (
    FORFEIT,
    STEPS,
    Failure,
    Reward,
    Segment,
    StopReason,
    Trajectory,
    TrajectoryGroup,
    Turn,
)

__all__ = [
    "FORFEIT",
    "STEPS",
    "AdapterSource",
    "Batch",
    "BoolArray",
    "Completion",
    "Content",
    "Failure",
    "Finish",
    "FloatArray",
    "ImageBlock",
    "IntArray",
    "Kept",
    "Message",
    "Rendered",
    "Reply",
    "Reward",
    "Role",
    "Sample",
    "Sampling",
    "Segment",
    "Step",
    "StopReason",
    "Task",
    "TextBlock",
    "ToolCall",
    "ToolResult",
    "ToolSchema",
    "Trajectory",
    "TrajectoryGroup",
    "Turn",
    "WeightSource",
]
