// The page: reads the form, and shows the tokens as they come. ?server=URL&prompt=TEXT&tokens=N fills the form and starts.
import { generate } from './steer.mjs';

const form = document.querySelector('form');
const text = document.querySelector('output');
const state = document.querySelector('#state');
const clientId = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16)).join('');

const PROTO = new URL('../../proto/', import.meta.url);
const root = new protobuf.Root();
root.resolvePath = (_, file) => new URL(file, PROTO).href; // protobuf.js has google/protobuf itself

async function show() {
  const { server, prompt, tokens } = Object.fromEntries(new FormData(form));
  text.value = '';
  state.textContent = 'waiting';
  try {
    await root.load('steer/v1/generation.proto');
    const request = { text: prompt, sampling: { maxTokens: Number(tokens) } };
    for await (const response of generate(server, root, request, { clientId })) {
      if (response.event === 'token') text.value += response.token.text;
      if (response.event === 'completed') state.textContent = `done: ${response.completed.usage.completionTokens} tokens`;
    }
  } catch (error) {
    state.textContent = `failed: ${error.code ?? ''} ${error.message}`;
  }
}

form.addEventListener('submit', (event) => {
  event.preventDefault();
  show();
});

const given = new URLSearchParams(location.search);
for (const [name, value] of given) form.elements[name].value = value;
if (given.size) show();
