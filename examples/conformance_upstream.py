"""The server that the public conformance suite expects, over streamable HTTP; both protocol eras.

Its tools, prompts and resources carry the names and contents that the suite's scenarios ask for. With suite
0.2.0-alpha.12 it passes 33 of 33 of 2025-11-25, and of 2026-07-28 all 37 scored scenarios and 4 of the 13 that are not
scored. The other 9 are `tasks-*` but `tasks-status-notifications`: the tasks extension, which the SDK does not serve.
"""

import argparse
import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import mcp_types as types
from counter_http import serve
from mcp import MCPError
from mcp.server import Server
from mcp.server.caching import CacheHint
from mcp.server.context import ServerRequestContext
from mcp.server.request_state import RequestStateBoundary, RequestStateSecurity
from mcp.server.streamable_http import EventCallback, EventId, EventMessage, EventStore, StreamId
from mcp.server.subscriptions import InMemorySubscriptionBus, ListenHandler
from mcp.shared.message import ServerMessageMetadata
from mcp.shared.subscriptions import PromptsListChanged, ToolsListChanged

NAME = "conformance-upstream"
RETRY_MS = 300
SCHEMA_2020_12 = "https://json-schema.org/draft/2020-12/schema"
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
WAV = "UklGRiYAAABXQVZFZm10IBAAAAABAAEAQB8AAEAfAAABAAgAZGF0YQIAAACAgA=="
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}

Context = ServerRequestContext[Any, Any]
ToolResult = types.CallToolResult | types.InputRequiredResult
Call = types.CallToolRequestParams
Handler = Callable[[Context, Call], Awaitable[ToolResult]]

TOOLS: dict[str, tuple[types.Tool, Handler]] = {}
BUS = InMemorySubscriptionBus()


def tool(name: str, description: str, schema: dict[str, Any] = NO_ARGUMENTS) -> Callable[[Handler], Handler]:
    """Register a tool under the name a scenario calls."""

    def register(handler: Handler) -> Handler:
        TOOLS[name] = types.Tool(name=name, description=description, input_schema=schema), handler
        return handler

    return register


def strings(*names: str) -> dict[str, Any]:
    """An object schema of required strings."""
    return {"type": "object", "properties": {name: {"type": "string"} for name in names}, "required": list(names)}


def text(value: str) -> types.TextContent:
    return types.TextContent(type="text", text=value)


def image() -> types.ImageContent:
    return types.ImageContent(type="image", data=PNG, mime_type="image/png")


def embedded(uri: str, mime_type: str, value: str) -> types.EmbeddedResource:
    contents = types.TextResourceContents(uri=uri, mime_type=mime_type, text=value)
    return types.EmbeddedResource(type="resource", resource=contents)


def answer(*content: types.ContentBlock, is_error: bool = False) -> types.CallToolResult:
    return types.CallToolResult(content=list(content), is_error=is_error)


# Content


@tool("test_simple_text", "Returns text")
async def simple_text(ctx: Context, call: Call) -> ToolResult:
    return answer(text("This is a simple text response for testing."))


@tool("test_image_content", "Returns an image")
async def image_content(ctx: Context, call: Call) -> ToolResult:
    return answer(image())


@tool("test_audio_content", "Returns audio")
async def audio_content(ctx: Context, call: Call) -> ToolResult:
    return answer(types.AudioContent(type="audio", data=WAV, mime_type="audio/wav"))


@tool("test_embedded_resource", "Returns an embedded resource")
async def embedded_resource(ctx: Context, call: Call) -> ToolResult:
    return answer(embedded("test://embedded-resource", "text/plain", "This is an embedded resource content."))


@tool("test_multiple_content_types", "Returns text, an image and a resource")
async def multiple_content_types(ctx: Context, call: Call) -> ToolResult:
    resource = embedded("test://mixed-content-resource", "application/json", '{"test":"data","value":123}')
    return answer(text("Multiple content types test:"), image(), resource)


@tool("test_error_handling", "Always fails")
async def error_handling(ctx: Context, call: Call) -> ToolResult:
    return answer(text("This tool intentionally returns an error for testing"), is_error=True)


JSON_SCHEMA_2020_12 = {
    "$schema": SCHEMA_2020_12,
    "type": "object",
    "$defs": {
        "address": {
            "$anchor": "addressDef",
            "type": "object",
            "properties": {"street": {"type": "string"}, "city": {"type": "string"}},
        }
    },
    "properties": {
        "name": {"type": "string"},
        "address": {"$ref": "#/$defs/address"},
        "contactMethod": {"type": "string", "enum": ["phone", "email"]},
        "phone": {"type": "string"},
        "email": {"type": "string"},
    },
    "allOf": [{"anyOf": [{"required": ["phone"]}, {"required": ["email"]}]}],
    "if": {"properties": {"contactMethod": {"const": "phone"}}, "required": ["contactMethod"]},
    "then": {"required": ["phone"]},
    "else": {"required": ["email"]},
    "additionalProperties": False,
}


@tool("json_schema_2020_12_tool", "Has an input schema with the vocabulary of JSON Schema 2020-12", JSON_SCHEMA_2020_12)
async def json_schema(ctx: Context, call: Call) -> ToolResult:
    return answer(text(f"received {json.dumps(call.arguments)}"))


REGION = {"type": "string", "description": "Mirrored into a request header", "x-mcp-header": "Region"}
WITH_REGION = {"type": "object", "properties": {"region": REGION}, "required": ["region"]}


@tool("test_x_mcp_header", "Has a parameter that is mirrored into a header", WITH_REGION)
async def x_mcp_header(ctx: Context, call: Call) -> ToolResult:
    return answer(text(f"region {(call.arguments or {}).get('region')}"))


# Notifications and requests of the server


async def send_log(ctx: Context, message: str) -> None:
    """A logging notification on the stream of this request; 2026-07-28 requests have to ask for it."""
    await ctx.session.send_log_message("info", message, logger=NAME, related_request_id=ctx.request_id)


@tool("test_tool_with_logging", "Sends three log messages")
async def tool_with_logging(ctx: Context, call: Call) -> ToolResult:
    await send_log(ctx, "Tool execution started")
    await asyncio.sleep(0.05)
    await send_log(ctx, "Tool processing data")
    await asyncio.sleep(0.05)
    await send_log(ctx, "Tool execution completed")
    return answer(text("Tool with logging executed successfully"))


@tool("test_logging_tool", "Sends one log message to callers that asked for it")
async def logging_tool(ctx: Context, call: Call) -> ToolResult:
    await send_log(ctx, "Logging tool called")
    return answer(text("logged"))


@tool("test_tool_with_progress", "Reports progress")
async def tool_with_progress(ctx: Context, call: Call) -> ToolResult:
    for progress in (0, 50, 100):
        await ctx.session.report_progress(progress, 100)
        await asyncio.sleep(0.05)
    return answer(text("Tool with progress executed successfully"))


def sampling_request(prompt: str, max_tokens: int = 100) -> types.CreateMessageRequest:
    message = types.SamplingMessage(role="user", content=text(prompt))
    params = types.CreateMessageRequestParams(messages=[message], max_tokens=max_tokens)
    return types.CreateMessageRequest(params=params)


def elicit_request(message: str, schema: dict[str, Any]) -> types.ElicitRequest:
    return types.ElicitRequest(params=types.ElicitRequestFormParams(message=message, requested_schema=schema))


@tool("test_sampling", "Asks the client's model", strings("prompt"))
async def sampling(ctx: Context, call: Call) -> ToolResult:
    result = await ctx.session.send_request(
        sampling_request((call.arguments or {})["prompt"]),
        types.CreateMessageResult,
        metadata=ServerMessageMetadata(related_request_id=ctx.request_id),
    )
    blocks = result.content if isinstance(result.content, list) else [result.content]
    return answer(text(f"LLM response: {' '.join(getattr(block, 'text', '') for block in blocks)}"))


async def elicit(ctx: Context, message: str, properties: dict[str, Any], required: list[str]) -> types.ElicitResult:
    schema = {"type": "object", "properties": properties, "required": required}
    return await ctx.session.elicit_form(message, schema, related_request_id=ctx.request_id)


@tool("test_elicitation", "Asks the user", strings("message"))
async def elicitation(ctx: Context, call: Call) -> ToolResult:
    properties = {
        "username": {"type": "string", "description": "User's response"},
        "email": {"type": "string", "description": "User's email address"},
    }
    result = await elicit(ctx, (call.arguments or {})["message"], properties, ["username", "email"])
    return answer(text(f"User response: action={result.action}, content={json.dumps(result.content)}"))


@tool("test_elicitation_sep1034_defaults", "Asks the user, with a default for every primitive type")
async def elicitation_defaults(ctx: Context, call: Call) -> ToolResult:
    properties = {
        "name": {"type": "string", "default": "John Doe"},
        "age": {"type": "integer", "default": 30},
        "score": {"type": "number", "default": 95.5},
        "status": {"type": "string", "enum": ["active", "inactive", "pending"], "default": "active"},
        "verified": {"type": "boolean", "default": True},
    }
    result = await elicit(ctx, "Please review the defaults", properties, [])
    return answer(text(f"Elicitation completed: action={result.action}, content={json.dumps(result.content)}"))


def titled(pairs: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"const": value, "title": title} for value, title in pairs.items()]


@tool("test_elicitation_sep1330_enums", "Asks the user, with every kind of enum")
async def elicitation_enums(ctx: Context, call: Call) -> ToolResult:
    options = ["option1", "option2", "option3"]
    properties = {
        "untitledSingle": {"type": "string", "enum": options},
        "titledSingle": {
            "type": "string",
            "oneOf": titled({"value1": "First Option", "value2": "Second Option", "value3": "Third Option"}),
        },
        "legacyEnum": {
            "type": "string",
            "enum": ["opt1", "opt2", "opt3"],
            "enumNames": ["Option One", "Option Two", "Option Three"],
        },
        "untitledMulti": {"type": "array", "items": {"type": "string", "enum": options}},
        "titledMulti": {
            "type": "array",
            "items": {"anyOf": titled({"value1": "First Choice", "value2": "Second Choice", "value3": "Third Choice"})},
        },
    }
    result = await elicit(ctx, "Please choose", properties, [])
    return answer(text(f"Elicitation completed: action={result.action}, content={json.dumps(result.content)}"))


@tool("test_reconnection", "Closes the stream of its own request; the answer comes to who reconnects")
async def reconnection(ctx: Context, call: Call) -> ToolResult:
    await asyncio.sleep(0.1)
    if ctx.close_sse_stream is not None:
        await ctx.close_sse_stream()
    await asyncio.sleep(0.2)
    return answer(text("Reconnection test completed"))


@tool("test_trigger_tool_change", "Says that the list of tools changed")
async def trigger_tool_change(ctx: Context, call: Call) -> ToolResult:
    await BUS.publish(ToolsListChanged())
    return answer(text("tools changed"))


@tool("test_trigger_prompt_change", "Says that the list of prompts changed")
async def trigger_prompt_change(ctx: Context, call: Call) -> ToolResult:
    await BUS.publish(PromptsListChanged())
    return answer(text("prompts changed"))


# Input in several rounds (2026-07-28)


def declared(ctx: Context) -> types.ClientCapabilities:
    return ctx.session.client_capabilities or types.ClientCapabilities()


def answered(call: Any, key: str, kind: type[Any]) -> Any:
    """The client's answer under this key, or None when it is absent or of another kind."""
    response = (call.input_responses or {}).get(key)
    return response if isinstance(response, kind) else None


def ask(state: str | None = None, **requests: types.InputRequest) -> types.InputRequiredResult:
    return types.InputRequiredResult(input_requests=requests, request_state=state)


CONFIRM = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}


@tool("test_missing_capability", "Needs the sampling capability")
async def missing_capability(ctx: Context, call: Call) -> ToolResult:
    if declared(ctx).sampling is None:
        data = {"requiredCapabilities": {"sampling": {}}}
        raise MCPError(types.MISSING_REQUIRED_CLIENT_CAPABILITY, "Sampling is required", data)
    return answer(text("sampling is declared"))


@tool("test_streaming_elicitation", "Reports progress, then asks the user")
async def streaming_elicitation(ctx: Context, call: Call) -> ToolResult:
    await ctx.session.report_progress(50, 100)
    if answered(call, "user_name", types.ElicitResult) is None:
        return ask(user_name=elicit_request("What is your name?", strings("name")))
    return answer(text("thank you"))


@tool("test_input_required_result_elicitation", "Asks for a name")
async def input_elicitation(ctx: Context, call: Call) -> ToolResult:
    response = answered(call, "user_name", types.ElicitResult)
    if response is None:
        return ask(user_name=elicit_request("What is your name?", strings("name")))
    return answer(text(f"Hello, {(response.content or {}).get('name')}!"))


@tool("test_input_required_result_sampling", "Asks the client's model for a capital")
async def input_sampling(ctx: Context, call: Call) -> ToolResult:
    response = answered(call, "capital_question", types.CreateMessageResult)
    if response is None:
        return ask(capital_question=sampling_request("What is the capital of France?"))
    return answer(text(getattr(response.content, "text", "")))


@tool("test_input_required_result_list_roots", "Asks for the client's roots")
async def input_list_roots(ctx: Context, call: Call) -> ToolResult:
    response = answered(call, "client_roots", types.ListRootsResult)
    if response is None:
        return ask(client_roots=types.ListRootsRequest(params=types.RequestParams()))
    return answer(text("roots: " + ", ".join(str(root.uri) for root in response.roots)))


@tool("test_input_required_result_request_state", "Asks, and checks the state that comes back")
async def input_request_state(ctx: Context, call: Call) -> ToolResult:
    if answered(call, "confirm", types.ElicitResult) is None or call.request_state != "state-1":
        return ask("state-1", confirm=elicit_request("Please confirm", CONFIRM))
    return answer(text("state-ok"))


@tool("test_input_required_result_tampered_state", "Asks, with a state that must come back untouched")
async def input_tampered_state(ctx: Context, call: Call) -> ToolResult:
    if answered(call, "confirm", types.ElicitResult) is None:
        return ask("sealed", confirm=elicit_request("Please confirm", CONFIRM))
    return answer(text(f"state {call.request_state}"))


@tool("test_input_required_result_multiple_inputs", "Asks for three things at once")
async def input_multiple(ctx: Context, call: Call) -> ToolResult:
    user = answered(call, "user_name", types.ElicitResult)
    greeting = answered(call, "greeting", types.CreateMessageResult)
    roots = answered(call, "client_roots", types.ListRootsResult)
    if user is None or greeting is None or roots is None:
        return ask(
            "multiple",
            user_name=elicit_request("What is your name?", strings("name")),
            greeting=sampling_request("Generate a greeting", 50),
            client_roots=types.ListRootsRequest(params=types.RequestParams()),
        )
    return answer(text(f"{getattr(greeting.content, 'text', '')} ({len(roots.roots)} roots)"))


@tool("test_input_required_result_multi_round", "Asks twice")
async def input_multi_round(ctx: Context, call: Call) -> ToolResult:
    if call.request_state == "step2" and answered(call, "step2", types.ElicitResult):
        return answer(text("Both steps done"))
    if call.request_state == "step1" and answered(call, "step1", types.ElicitResult):
        return ask("step2", step2=elicit_request("Step 2: What is your favorite color?", strings("color")))
    return ask("step1", step1=elicit_request("Step 1: What is your name?", strings("name")))


@tool("test_input_required_result_capabilities", "Asks only what the client can answer")
async def input_capabilities(ctx: Context, call: Call) -> ToolResult:
    requests: dict[str, types.InputRequest] = {}
    if declared(ctx).elicitation is not None:
        requests["user_name"] = elicit_request("What is your name?", strings("name"))
    if declared(ctx).sampling is not None:
        requests["greeting"] = sampling_request("Generate a greeting", 50)
    if not requests or any(key in (call.input_responses or {}) for key in requests):
        return answer(text("nothing to ask"))
    return ask(**requests)


# Resources and prompts

TEXTS = {
    "test://static-text": "This is the content of the static text resource.",
    "test://watched-resource": "This resource can be watched.",
}
TEMPLATE = "test://template/{id}/data"


async def list_resources(ctx: Context, params: Any) -> types.ListResourcesResult:
    resources = [
        types.Resource(uri=uri, name=uri.removeprefix("test://"), description="A text", mime_type="text/plain")
        for uri in TEXTS
    ]
    binary = types.Resource(
        uri="test://static-binary", name="static-binary", description="An image", mime_type="image/png"
    )
    return types.ListResourcesResult(resources=[*resources, binary])


async def list_templates(ctx: Context, params: Any) -> types.ListResourceTemplatesResult:
    template = types.ResourceTemplate(
        uri_template=TEMPLATE, name="template", description="Data by id", mime_type="application/json"
    )
    return types.ListResourceTemplatesResult(resource_templates=[template])


async def read_resource(ctx: Context, params: types.ReadResourceRequestParams) -> types.ReadResourceResult:
    uri = str(params.uri)
    prefix, suffix = TEMPLATE.split("{id}")
    if uri in TEXTS:
        contents: Any = types.TextResourceContents(uri=uri, mime_type="text/plain", text=TEXTS[uri])
    elif uri == "test://static-binary":
        contents = types.BlobResourceContents(uri=uri, mime_type="image/png", blob=PNG)
    elif uri.startswith(prefix) and uri.endswith(suffix):
        ident = uri[len(prefix) : -len(suffix)]
        body = json.dumps({"id": ident, "templateTest": True, "data": f"Data for ID: {ident}"})
        contents = types.TextResourceContents(uri=uri, mime_type="application/json", text=body)
    else:
        raise MCPError(types.INVALID_PARAMS, "Resource not found", {"uri": uri})
    return types.ReadResourceResult(contents=[contents])


PROMPTS: dict[str, tuple[str, list[str]]] = {
    "test_simple_prompt": ("A prompt without arguments", []),
    "test_prompt_with_arguments": ("A prompt with two arguments", ["arg1", "arg2"]),
    "test_prompt_with_embedded_resource": ("A prompt with a resource", ["resourceUri"]),
    "test_prompt_with_image": ("A prompt with an image", []),
    "test_input_required_result_prompt": ("A prompt that asks first", []),
}


async def list_prompts(ctx: Context, params: Any) -> types.ListPromptsResult:
    prompts = [
        types.Prompt(
            name=name,
            description=description,
            arguments=[types.PromptArgument(name=arg, description=f"Value of {arg}", required=True) for arg in args],
        )
        for name, (description, args) in PROMPTS.items()
    ]
    return types.ListPromptsResult(prompts=prompts)


async def get_prompt(
    ctx: Context, params: types.GetPromptRequestParams
) -> types.GetPromptResult | types.InputRequiredResult:
    arguments = params.arguments or {}
    if params.name not in PROMPTS:
        raise MCPError(types.INVALID_PARAMS, f"Unknown prompt: {params.name}")
    missing = [name for name in PROMPTS[params.name][1] if name not in arguments]
    if missing:
        raise MCPError(types.INVALID_PARAMS, f"Missing arguments: {', '.join(missing)}")
    content: list[Any]
    match params.name:
        case "test_prompt_with_arguments":
            content = [text(f"Prompt with arguments: arg1='{arguments['arg1']}', arg2='{arguments['arg2']}'")]
        case "test_prompt_with_embedded_resource":
            resource = embedded(arguments["resourceUri"], "text/plain", "Embedded resource content for testing.")
            content = [resource, text("Please process the embedded resource above.")]
        case "test_prompt_with_image":
            content = [image(), text("Please analyze the image above.")]
        case "test_input_required_result_prompt":
            response = answered(params, "user_context", types.ElicitResult)
            if response is None:
                return ask(user_context=elicit_request("What context should the prompt use?", strings("context")))
            content = [text(f"Context: {(response.content or {}).get('context')}")]
        case _:
            content = [text("This is a simple prompt for testing.")]
    return types.GetPromptResult(messages=[types.PromptMessage(role="user", content=block) for block in content])


# The server


async def list_tools(ctx: Context, params: Any) -> types.ListToolsResult:
    return types.ListToolsResult(tools=[definition for definition, _ in TOOLS.values()])


async def call_tool(ctx: Context, call: Call) -> ToolResult:
    if call.name not in TOOLS:
        raise MCPError(types.INVALID_PARAMS, f"Unknown tool: {call.name}")
    definition, handler = TOOLS[call.name]
    missing = [name for name in definition.input_schema.get("required", []) if name not in (call.arguments or {})]
    if missing:
        return answer(text(f"Missing arguments: {', '.join(missing)}"), is_error=True)
    return await handler(ctx, call)


def tool_schema(name: str) -> Mapping[str, Any] | None:
    return TOOLS[name][0].input_schema if name in TOOLS else None


async def complete(ctx: Context, params: types.CompleteRequestParams) -> types.CompleteResult:
    values = [value for value in ("paris", "park", "party", "test") if value.startswith(params.argument.value)]
    return types.CompleteResult(completion=types.Completion(values=values, total=len(values), has_more=False))


async def accept(ctx: Context, params: Any) -> types.EmptyResult:
    """`logging/setLevel`, `resources/subscribe` and `resources/unsubscribe`: nothing here depends on them."""
    return types.EmptyResult()


class RecentEvents(EventStore):
    """The last events of all streams, for clients that reconnect with `Last-Event-ID`."""

    KEPT = 10_000

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._events: dict[EventId, tuple[StreamId, Any]] = {}

    async def store_event(self, stream_id: StreamId, message: Any) -> EventId:
        event_id = str(next(self._ids))
        self._events[event_id] = stream_id, message
        if len(self._events) > self.KEPT:
            del self._events[next(iter(self._events))]
        return event_id

    async def replay_events_after(self, last_event_id: EventId, send_callback: EventCallback) -> StreamId | None:
        if last_event_id not in self._events:
            return None
        stream_id = self._events[last_event_id][0]
        later = [
            (event_id, message)
            for event_id, (stream, message) in self._events.items()
            if stream == stream_id and int(event_id) > int(last_event_id) and message is not None
        ]
        for event_id, message in later:
            await send_callback(EventMessage(message, event_id))
        return stream_id


def build_server() -> Server[Any]:
    hint = CacheHint(ttl_ms=1000, scope="private")
    server: Server[Any] = Server(
        NAME,
        version="1.0.0",
        cache_hints={
            "tools/list": hint,
            "prompts/list": hint,
            "resources/list": hint,
            "resources/templates/list": hint,
            "resources/read": hint,
        },
        get_tool_input_schema=tool_schema,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
        on_list_resources=list_resources,
        on_list_resource_templates=list_templates,
        on_read_resource=read_resource,
        on_subscribe_resource=accept,
        on_unsubscribe_resource=accept,
        on_subscriptions_listen=ListenHandler(BUS),
        on_list_prompts=list_prompts,
        on_get_prompt=get_prompt,
        on_completion=complete,
    )
    server.add_request_handler("logging/setLevel", types.SetLevelRequestParams, accept)
    server.middleware.append(RequestStateBoundary(RequestStateSecurity.ephemeral(), default_audience=NAME))
    return server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free port")
    args = parser.parse_args()
    # Without transport_security the SDK allows loopback Host and Origin headers only, which is what the suite checks.
    app = build_server().streamable_http_app(event_store=RecentEvents(), retry_interval=RETRY_MS)
    # httptools leaves the whitespace after a header's value; the scenario `http-header-validation` wants it gone.
    serve(app, args.port, http="h11")


if __name__ == "__main__":
    main()
