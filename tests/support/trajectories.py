"""Trajectories made by hand: short, complete, different from one another."""

from __future__ import annotations

from turnwise.types import (
    Failure,
    Finish,
    Message,
    Reward,
    Sampling,
    Segment,
    Step,
    StopReason,
    ToolCall,
    ToolResult,
    ToolSchema,
    Trajectory,
    Turn,
)

MOVE = ToolSchema(
    name="move",
    description="Move the paddle.",
    parameters={
        "type": "object",
        "properties": {"direction": {"type": "string", "enum": ["left", "stay", "right"]}},
        "required": ["direction"],
    },
)


def trajectory(
    id: str = "rl/0/catch/0/s0",
    *,
    env: str = "catch",
    reward: float | None = 1.0,
    task: dict[str, object] | None = None,
    moves: tuple[str, ...] = ("left", "stay"),
    question: str = "ball 3 paddle 1 rows 2",
    stop_reason: StopReason = StopReason.TERMINATED,
    policy: str = "engine",
) -> Trajectory:
    """An episode of one tool call a turn; sampled, unless the policy is the teacher."""
    sampled = policy == "engine"
    turns = []
    for number, move in enumerate(moves):
        call = ToolCall(name="move", arguments={"direction": move}, id=f"c{number}")
        last = number == len(moves) - 1
        step = Step(
            "The ball is down." if last else f"ball 3 paddle {number}", terminated=last, reward=reward
        )
        content = step.observation
        assert isinstance(content, str)
        turns.append(
            Turn(
                message=Message.assistant("", call),
                context_ids=[1, 2, 3] if sampled else None,
                ids=[7, 8, 9] if sampled else None,
                logprobs=[-0.1, -0.25, -1e-7] if sampled else None,
                versions=[4, 4, 5] if sampled else None,
                finish=Finish.STOP,
                tool_results=(ToolResult(call=call, content=content, step=step if last else None),),
                feedback=(Message.tool(content, call=call),),
                reward=reward if last else None,
                policy_seconds=0.01,
                env_seconds=0.002,
            )
        )
    failed = stop_reason.failed
    return Trajectory(
        id=id,
        group_id=id.rpartition("/")[0],
        env=env,
        task={"column": 3} if task is None else task,
        seed=11,
        tools=(MOVE,),
        segments=(Segment(prompt=(Message.system("Catch."), Message.user(question)), turns=tuple(turns)),),
        rewards={} if reward is None or failed else {"env": Reward(value=reward)},
        stop_reason=stop_reason,
        error=Failure(kind="EnvLostError", message="the server is gone", where="environment catch: call")
        if failed
        else None,
        sampling=Sampling(max_tokens=16, stop_ids=(2,)) if sampled else None,
        policy=policy,
        harness="abc123",
        metrics={"malformed_calls": 0.0},
        started=1_700_000_000.25,
        seconds=0.5,
    )
