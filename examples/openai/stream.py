from openai import OpenAI
client = OpenAI(api_key="YOUR_API_KEY", base_url="http://127.0.0.1:8080/v1")
stream = client.chat.completions.create(
    model="gpt-5.4", stream=True, messages=[{"role": "user", "content": "Write a haiku about streaming."}],
)
for chunk in stream:
    delta = chunk.choices[0].delta
    if delta.content: print(delta.content, end="", flush=True)
