// The OpenAI-compatible API, asked by the openai package for JavaScript.
//     node contract.mjs BASE_URL PART

import assert from "node:assert/strict";
import OpenAI from "openai";

const [baseURL, part] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const hello = [{ role: "user", content: "Hello" }];
const schema = {
  type: "object",
  properties: { unit: { enum: ["C", "F"] } },
  required: ["unit"],
  additionalProperties: false,
};
const weather = { type: "function", function: { name: "weather", parameters: schema } };

async function collected(stream) {
  const all = [];
  for await (const each of stream) all.push(each);
  return all;
}

const parts = {
  async completions() {
    const models = await client.models.list();
    assert.ok(models.data.some((model) => model.id === "plain"));
    assert.equal((await client.models.retrieve("plain")).object, "model");
    const common = { model: "plain", temperature: 0, max_tokens: 4 };
    const whole = await client.completions.create({
      ...common, prompt: ["Hello", "A cat"], n: 2, echo: true, logprobs: 2, stop: ["never"], seed: 1,
      presence_penalty: 0.1, frequency_penalty: 0.1, logit_bias: { 17: -100 }, top_p: 0.9,
    });
    assert.deepEqual(whole.choices.map((choice) => choice.index), [0, 1, 2, 3]);
    const { tokens, token_logprobs, top_logprobs, text_offset } = whole.choices[0].logprobs;
    assert.equal(token_logprobs[0], null);
    assert.equal(tokens.length, token_logprobs.length);
    assert.equal(top_logprobs.length, text_offset.length);
    assert.ok(whole.choices[0].text.startsWith("Hello"));
    const byTokens = await client.completions.create({ ...common, prompt: [[40, 41], [42]] });
    assert.equal(byTokens.choices.length, 2);
    const single = await client.completions.create({ ...common, prompt: "Hello" });
    const chunks = await collected(await client.completions.create({
      ...common, prompt: "Hello", stream: true, stream_options: { include_usage: true },
    }));
    assert.equal(chunks.flatMap((chunk) => chunk.choices).map((choice) => choice.text).join(""),
      single.choices[0].text);
    assert.deepEqual(chunks.at(-1).choices, []);
    assert.equal(chunks.at(-1).usage.total_tokens, single.usage.total_tokens);
  },

  async chat() {
    const body = {
      model: "plain", messages: [{ role: "developer", content: "Be kind." }, ...hello], temperature: 0,
      max_completion_tokens: 6, logprobs: true, top_logprobs: 2, n: 2, seed: 5,
    };
    const whole = await client.chat.completions.create(body);
    assert.equal(whole.choices.length, 2);
    assert.equal(whole.choices[0].logprobs.content.length, 6);
    assert.equal(typeof whole.usage.prompt_tokens_details.cached_tokens, "number");
    const stream = client.chat.completions.stream({ ...body, stream_options: { include_usage: true } });
    const final = await stream.finalChatCompletion();
    assert.equal(final.choices[0].message.content, whole.choices[0].message.content);
    assert.equal(final.choices[0].finish_reason, whole.choices[0].finish_reason);
    assert.equal(final.usage.completion_tokens, whole.usage.completion_tokens);
    const json = await client.chat.completions.parse({
      model: "plain", messages: hello, temperature: 0,
      response_format: { type: "json_schema", json_schema: { name: "weather", strict: true, schema } },
    });
    assert.ok(schema.properties.unit.enum.includes(JSON.parse(json.choices[0].message.content).unit));
  },

  async tools() {
    for (const model of ["hermes", "llama3", "mistral"]) {
      const body = { model, messages: hello, temperature: 0, tools: [weather], tool_choice: "required" };
      const whole = await client.chat.completions.create(body);
      assert.equal(whole.choices[0].finish_reason, "tool_calls");
      const [call] = whole.choices[0].message.tool_calls;
      assert.ok(schema.properties.unit.enum.includes(JSON.parse(call.function.arguments).unit));
      const final = await client.chat.completions.stream(body).finalChatCompletion();
      assert.deepEqual(final.choices[0].message.tool_calls[0].function.arguments, call.function.arguments);
      const messages = [
        ...hello, whole.choices[0].message, { role: "tool", tool_call_id: call.id, content: "sunny" },
      ];
      const next = await client.chat.completions.create({ model, messages, max_tokens: 4, temperature: 0 });
      assert.equal(typeof next.choices[0].message.content, "string");
    }
  },

  async responses() {
    const body = { model: "plain", input: "Hello", temperature: 0, max_output_tokens: 6 };
    const whole = await client.responses.create(body);
    assert.equal(whole.status, "incomplete");
    const events = await collected(await client.responses.create({ ...body, stream: true }));
    assert.equal(events.at(-1).response.output[0].content[0].text, whole.output_text);
    assert.deepEqual(events.map((event) => event.sequence_number), events.map((_, index) => index));
    const call = await client.responses.create({
      model: "hermes", input: "Hello", temperature: 0, tool_choice: "required",
      tools: [{ type: "function", name: "weather", parameters: schema, strict: true }],
    });
    assert.equal(call.output[0].type, "function_call");
    const json = {
      model: "plain", input: "Hello", temperature: 0,
      text: { format: { type: "json_schema", name: "weather", schema, strict: true } },
    };
    const final = await client.responses.stream(json).finalResponse();
    assert.equal(final.status, "completed");
    assert.ok(schema.properties.unit.enum.includes(JSON.parse(final.output_text).unit));
  },

  async errors() {
    const chat = (fields) => client.chat.completions.create({ model: "plain", messages: hello, ...fields });
    await assert.rejects(chat({ model: "no/such" }), OpenAI.NotFoundError);
    await assert.rejects(chat({ temperature: 3 }), (error) =>
      error instanceof OpenAI.BadRequestError && error.param === "temperature");
    await assert.rejects(chat({ tools: [weather] }), /cannot call functions/);
    await assert.rejects(chat({ messages: [{ role: "user", content: "a ".repeat(2000) }] }), (error) =>
      error.code === "context_length_exceeded");
  },
};

await parts[part]();
console.log(`${part}: ok`);
