// The engine on LiteRT. app/build.gradle.kts: implementation("com.google.ai.edge.litert:litert:2.3.0") or newer.
// For a GPU or NPU choose another Accelerator, and run check() again: its arithmetic is another one.
// One input and one output: the buffers of several come in an order that is LiteRT's own. The batch is the file's: no resizing.
package ondevice

import android.content.Context
import com.google.ai.edge.litert.Accelerator
import com.google.ai.edge.litert.CompiledModel

class Engine(context: Context, private val facts: Facts) : AutoCloseable {
    private val model = CompiledModel.create(context.assets, "model/${facts.file}", CompiledModel.Options(Accelerator.CPU))
    private val inputs = model.createInputBuffers()
    private val outputs = model.createOutputBuffers()

    fun infer(feeds: Map<String, FloatArray>): Map<String, FloatArray> {
        inputs.single().writeFloat(feeds.getValue(facts.inputs.single().name))
        model.run(inputs, outputs)
        return mapOf(facts.outputs.single().name to outputs.single().readFloat())
    }

    override fun close() = model.close()
}
