import openai

client = openai.OpenAI(api_key="YOUR_API_KEY", base_url="http://127.0.0.1:8080/v1")
stream = client.responses.create(
    model="gpt-5.4", input="Write a haiku about streaming.", background=True, stream=True
)
response_id, last, is_over = "", 0, False
while not is_over:
    try:
        for event in stream:
            last = event.sequence_number
            if event.type == "response.created":
                response_id = event.response.id
            elif event.type == "response.output_text.delta":
                print(event.delta, end="", flush=True)
            elif event.type in ("response.completed", "response.incomplete", "response.failed"):
                is_over = True
            if last == 9:
                stream.close()  # as if the connection had been lost
                raise openai.APIConnectionError(request=stream.response.request)
    except openai.APIError:  # the network, or a relay that goes: the response itself goes on
        stream = client.responses.retrieve(response_id, stream=True, starting_after=last)

again = client.responses.create(model="gpt-5.4", input="Tell me a long story.", background=True)
print("\n" + client.responses.cancel(again.id).status)
